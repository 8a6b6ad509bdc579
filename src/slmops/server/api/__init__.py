"""The HTTP surface for machines: devices, operators' tools, monitors."""
