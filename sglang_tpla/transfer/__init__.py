"""The transfer agent: latent caches from prefill ranks to decode ranks over ZMQ and TCP.

`PrefillAgent` gathers a request's latent rows, projects them with the receiver's matrices and sends them in checksummed
chunks. `DecodeAgent` asks for rooms, grants credit, and writes the chunks into its paged pool while the room's
generation is alive. PROTOCOL.md specifies the wire.
"""
