"""Sockets and channels: control over ZMQ, payloads over TCP data channels, security, bootstrap."""
