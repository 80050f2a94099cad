"""The benchmark of the three ways into Ray: each KV-aware and round robin, on the same requests.

Modules, in the order of the data: ``settings`` (every option), ``work`` (the batches), ``fleet`` (Ray and the engines),
``modes`` (the three ways in), ``records`` (one sample, and a run's figures), ``runner``, ``report``, ``command``.
What is not Ray's is ``kvrouter.bench``'s: workloads, statistics, plots, the form of ``results.json``.
"""
