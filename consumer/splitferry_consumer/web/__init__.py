"""What `consume --web` serves: the live page, its JSON, metrics and health (extra `web`).

`status.py` makes the JSON, `metrics.py` the metrics, `health.py` looks at what can keep the
consumer from working; `source.py` is all that of one consumer process, `workers.py` of several.
`app.py` answers, `server.py` runs it in the loop of the consumer or of its supervisor.
"""
