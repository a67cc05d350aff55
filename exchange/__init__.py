"""What passes between server and devices: protocol, round plan, replies and their validation."""
