"""Serves a model over HTTP: requests that wait at the same time share packed rows."""
