"""The transfer agent: latent caches from prefill ranks to decode ranks over ZMQ.

`prefill.PrefillAgent` gathers a request's latent rows, projects them with the receiver's matrices and sends
them in checksummed chunks; `decode.DecodeAgent` asks for rooms, grants credits, and scatters what arrives
into its paged pool while the room's generation is alive. PROTOCOL.md specifies the wire.
"""
