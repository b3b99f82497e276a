"""The scorer: score requests in, answers out, with the champion of the moment.

intake    runs of requests → batches for one forward pass
serving   one version, ready to answer
swap      which version answers: follows what the registry names
waiting   requests while no scorer has a version
answers   a batch of requests → a record each on `scores`
outbox    sends the records
start     the offset from which each partition is read
metrics   what a scorer reports
worker    the Faust app around these

`model.requests` decodes the features of requests.
"""
