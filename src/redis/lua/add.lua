-- Adds items to their lanes. ARGV: number of lanes, (lane, info)*, (index of lane, id, attempt,
-- data)*. Replies with the number added; an item that is here already is not added again.
local time, lanes, at = now_ms(), {}, 2
for index = 1, tonumber(ARGV[1]) do
  lanes[index] = ARGV[at]
  open(ARGV[at], ARGV[at + 1], time)
  at = at + 2
end
local added, rung = 0, {}
while ARGV[at] do
  local lane, id, attempt = lanes[tonumber(ARGV[at])], ARGV[at + 1], tonumber(ARGV[at + 2])
  if admit(id, attempt, lane, HELD) then
    put(lane, id, attempt, ARGV[at + 3])
    added = added + 1
    rung[lane] = true
  end
  at = at + 4
end
for lane in pairs(rung) do redis.call('PUBLISH', BELL, lane) end
return added
