-- Ends consumers that hold nothing, and lanes that hold nothing, once unused for so long.
-- ARGV: milliseconds for consumers, milliseconds for lanes, lane*. Replies with the number of
-- lanes that went.
local time, gone = now_ms(), 0
for at = 3, #ARGV do
  local lane = ARGV[at]
  local key = stream(lane)
  local consumers, pending = redis.pcall('XINFO', 'CONSUMERS', key, GROUP), 0
  if consumers.err then consumers = {} end
  for _, consumer in ipairs(consumers) do
    -- name, pending, idle, each after its label.
    pending = pending + consumer[4]
    if consumer[4] == 0 and consumer[6] >= tonumber(ARGV[1]) then
      redis.call('XGROUP', 'DELCONSUMER', key, GROUP, consumer[2])
    end
  end
  local used = tonumber(redis.call('ZSCORE', LANES, lane) or '0')
  if pending == 0 and used <= time - tonumber(ARGV[2]) and redis.call('XLEN', key) == 0 then
    redis.call('DEL', key)
    redis.call('ZREM', LANES, lane)
    redis.call('HDEL', INFO, lane)
    redis.call('SREM', GIVEN, lane)
    gone = gone + 1
  end
end
return gone
