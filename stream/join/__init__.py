"""The join: impressions and clicks in, labelled examples out, each exactly once.

events     records of a run → event times and ids; what can't be read is a dead letter
logic      the decisions, pure: a state and a step's events in, labels and state changes out
examples   how a labelled example looks as a Kafka record
progress   what the committed offsets' metadata carries
partition  the protocol of one partition: decide, commit one transaction, apply
takeover   what happens when a partition is assigned: fence, read, rebuild
worker     the Faust app around it
"""
