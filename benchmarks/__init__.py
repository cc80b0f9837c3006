"""The benchmark suite: `python -m benchmarks run | compare | plot`; the same cases under pytest-benchmark.

registry.py   what is measured: operations, cases, names
ops/          one file per operation: its shapes, inputs, rivals, check
models.py     the same for whole networks
providers.py  who does it: fastldm's backends
measure.py    one case from check to rows; timing.py, floors.py, memory.py and checks.py under it
report.py     tables and JSON files; plot.py their pictures; machine.py what they say of the machine
compare.py    two revisions of this repository in one run, each in a worker.py process
"""
