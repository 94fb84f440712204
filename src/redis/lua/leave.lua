-- Gives back all that a consumer has, and ends it. ARGV: consumer, lane*. Replies with the number
-- given back.
local given = 0
for at = 2, #ARGV do
  local lane = ARGV[at]
  local key, here = stream(lane), 0
  repeat
    local held = redis.pcall('XPENDING', key, GROUP, '-', '+', 100, ARGV[1])
    if held.err then held = {} end
    for _, pending in ipairs(held) do
      redis.call('XCLAIM', key, GROUP, '-', 0, pending[1], 'IDLE', GIVEN_IDLE, 'JUSTID')
      here = here + 1
    end
  until #held == 0
  -- Pending entries of a consumer would go with it; it has none by now.
  redis.pcall('XGROUP', 'DELCONSUMER', key, GROUP, ARGV[1])
  if here > 0 then
    redis.call('SADD', GIVEN, lane)
    redis.call('PUBLISH', BELL, lane)
  end
  given = given + here
end
return given
