"""The spend report: its data sources, its queries, and how it shows the results.

`reading` finds a running system, the data directory of a stopped one, or an archive; `queries` runs on a copy of the
projection; `figures`, `charts` and `tables` show the results; `page` writes a self-contained file, `app` serves the
notebook. Only `figures`, `charts`, `page` and `app` need the extra `tollbook[report]`. The report never delays a call
and never changes data.
"""
