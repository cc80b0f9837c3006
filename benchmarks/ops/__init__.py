"""One file per operation, as in `fastldm/ops`: its shapes, its rivals, and how results are checked."""
