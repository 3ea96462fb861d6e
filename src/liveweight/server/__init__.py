"""The server: an OpenAI-compatible API, liveweight's own, and the page, on one model.

`app.create_app` makes the application of a `service.Service`; `running.run` is `liveweight serve`. Nothing is imported
here, so that a verb that needs only the keys does not load a web framework.
"""
