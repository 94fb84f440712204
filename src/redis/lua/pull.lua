-- Delivers from lanes in this order: what was given back first, then what nobody had.
-- ARGV: consumer, most to deliver, (lane, most from it)*. Replies: era, number of groups made anew,
-- (index of lane, entry, id, attempt, data)*.
local consumer, left = ARGV[1], tonumber(ARGV[2])
local reply, renewed = { redis.call('GET', ERA) or '', 0 }, 0
for at = 3, #ARGV, 2 do
  if left <= 0 then break end
  local lane, index = ARGV[at], (at - 1) / 2
  local key, want = stream(lane), math.min(left, tonumber(ARGV[at + 1]))
  left = left - want
  if redis.call('SISMEMBER', GIVEN, lane) == 1 then
    local taken, more = take_over(reply, index, lane, consumer, GIVEN_IDLE, want)
    want = want - taken
    if not more then redis.call('SREM', GIVEN, lane) end
  end
  if want > 0 then
    local read = { 'XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', want, 'STREAMS', key, '>' }
    local got = redis.pcall(unpack(read))
    if got and got.err and redis.call('EXISTS', key) == 1 then
      redis.call('XGROUP', 'CREATE', key, GROUP, '0')
      renewed = renewed + 1
      got = redis.pcall(unpack(read))
    end
    if got and not got.err then
      for _, entry in ipairs(got[1][2]) do
        want = want - tell(reply, index, lane, entry)
      end
    end
  end
  left = left + want
end
reply[2] = renewed
return reply
