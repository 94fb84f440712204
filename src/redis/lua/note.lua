-- Publishes a note that lapses. ARGV: board, name, text, milliseconds.
local board = P .. 'notes:' .. ARGV[1]
redis.call('HSET', board, ARGV[2], ARGV[3])
redis.call('ZADD', board .. ':until', whole(now_ms() + tonumber(ARGV[4])), ARGV[2])
return 1
