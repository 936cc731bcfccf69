"""Talking to core: the codec of its messages, client, change stream, reports, push endpoint."""
