-- For how long the store has been up, in ms.
-- KEYS: up. ARGV: lease_ms.
-- Invariant: the answer never reaches back before a loss of the store's memory. Made again it only answers later.

return touch_up(KEYS[1], now_ms(), tonumber(ARGV[1]))
