"""Check requests where they enter, so that a bad one fails alone and at once."""
