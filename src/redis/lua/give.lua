-- Gives deliveries back: they keep their place, and the next pull of the lane takes them.
-- ARGV: consumer, (lane, entry)*. Replies with their number.
local given, rung = 0, {}
for at = 2, #ARGV, 2 do
  local lane, entry = ARGV[at], ARGV[at + 1]
  local held = redis.pcall('XPENDING', stream(lane), GROUP, entry, entry, 1, ARGV[1])
  if not held.err and #held == 1 then
    redis.call('XCLAIM', stream(lane), GROUP, '-', 0, entry, 'IDLE', GIVEN_IDLE, 'JUSTID')
    rung[lane] = true
    given = given + 1
  end
end
for lane in pairs(rung) do
  redis.call('SADD', GIVEN, lane)
  redis.call('PUBLISH', BELL, lane)
end
return given
