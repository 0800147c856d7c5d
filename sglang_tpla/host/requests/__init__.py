"""What a client may ask for: checked where a request enters, so that it fails alone and at once."""
