"""The scorer: score requests in, answers out, with the champion of the moment.

intake    runs of requests → batches for one forward pass
decode    requests → hashed features, quick also when there are few
serving   one version, ready to answer
swap      which version answers: follows what the registry names
waiting   requests while no scorer has a version
answers   a batch of requests → a record each on `scores`
outbox    sends them
start     where partitions go on
metrics   what a scorer reports
worker    the Faust app around it
"""
