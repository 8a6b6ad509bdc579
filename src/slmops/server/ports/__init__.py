"""What the services need from the world: rows and transactions, blobs, signed metadata, time and names."""
