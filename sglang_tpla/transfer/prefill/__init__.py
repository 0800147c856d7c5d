"""The prefill agent: peers, rooms, and the sending of chunks."""
