"""`headrace demo`: the whole system in one run, on real impressions, with a rollback.

workers    the worker processes: started, watched, stopped
audit      what the topics hold afterwards, counted: the ledger
view       what a terminal shows meanwhile
play       the run itself
"""
