"""The decode agent: connections, rooms, credits, and the receipt of chunks."""
