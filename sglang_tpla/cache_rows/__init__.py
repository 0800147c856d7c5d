"""What one cached token is in memory and on the wire: row formats shared by attention and transfer."""
