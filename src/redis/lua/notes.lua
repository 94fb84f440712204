-- Reads a board of notes, without those that have lapsed. ARGV: board. Replies: (name, text)*.
local board = P .. 'notes:' .. ARGV[1]
for _, name in ipairs(redis.call('ZRANGEBYSCORE', board .. ':until', '-inf', whole(now_ms()))) do
  redis.call('ZREM', board .. ':until', name)
  redis.call('HDEL', board, name)
end
return redis.call('HGETALL', board)
