"""KV pulls between two processes: how long they take, and how much they disturb two engines."""
