"""Where the stages of a run are done: in this process, in its threads, or in worker processes of a Dask cluster.

`execution` opens the `executors` that a run asks for. `cluster` is that of Dask, on a `local_cluster`, which a run
starts for what the `machine` has, or on that of a running `scheduler`. `processes` is for code that must run in another
process, and `watch` says what changes among the workers.
"""
