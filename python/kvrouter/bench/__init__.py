"""The benchmark: the same requests under round robin and KV-aware routing, on real or simulated workers.

Modules, in the order of the data:

- ``settings``: every option of a run, defined once for Python, the command line and the example.
- ``workloads``: deterministic lists of requests (``shared``, ``thrash``, ``group``, ``unique``).
- ``router_process``: the router as a process of its own, and what it says of itself.
- ``counters``: the workers' own prefix-cache counters, read from ``/metrics``.
- ``client``: closed-loop users that ask the router and stream from the chosen worker.
- ``runner``: one whole run, from starting the workers to the results.
- ``stats``, ``report``, ``plots``: from request records to figures, tables, JSON and pictures.
- ``command``: the Typer command behind ``kvrouter bench`` and ``examples/run_router_benchmark.py``.

Nothing is imported here, so that ``import kvrouter.bench`` costs nothing.
"""
