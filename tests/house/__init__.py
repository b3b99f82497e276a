"""Rules of the house that no tool checks: `python -m tests.house`, a part of `make check`.

| rule | module |
| --- | --- |
| a file has at most 400 lines, or a reason in its first lines | `sizes` |
| `stream/` has no loose file but `__init__`, `settings` and `errors` | `sizes` |
| a module says what it exports; others import nothing else of it, and everything exported is used | `exports` |
| each entry of an allow-list says why, and is still needed | `exports` |
"""
