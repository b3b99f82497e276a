"""The scorer: score requests in, answers out, with the champion of the moment.

serving   one version, ready to answer; the last few champions are kept
swap      follows the registry and swaps the version served
answers   a run of requests → a record each on `scores`
metrics   what a scorer reports
worker    the Faust app around it
"""
