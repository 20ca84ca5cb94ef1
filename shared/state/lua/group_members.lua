-- Members whose membership stands.
-- KEYS: members.
-- Reads only.

return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%.0f', now_ms()), '+inf')
