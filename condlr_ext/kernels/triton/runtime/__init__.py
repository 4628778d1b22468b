"""What the launches of all wings share: tables on the device, and programs that work in groups."""
