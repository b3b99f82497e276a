"""Every room's tests, by room."""

import os

# Of torch, here and in the workers that tests start: small models' threads wait for one another longer than they compute,
# most of all where two tests run at a time. It is read when torch is loaded, so before everything else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
