-- Keeps items until they are due. ARGV: number of lanes, (lane, info)*, (index of lane, id,
-- attempt, data, milliseconds from now)*. Replies with the number kept.
local time, lanes, at = now_ms(), {}, 2
for index = 1, tonumber(ARGV[1]) do
  lanes[index] = { ARGV[at], ARGV[at + 1] }
  at = at + 2
end
local kept = 0
while ARGV[at] do
  local lane, id, attempt = lanes[tonumber(ARGV[at])], ARGV[at + 1], tonumber(ARGV[at + 2])
  local due = time + tonumber(ARGV[at + 4])
  -- Listed until then, so that the lane's description is there when the item moves.
  open(lane[1], lane[2], due)
  if admit(id, attempt, lane[1], PROMISED) then
    redis.call('ZADD', DELAYED, whole(due), id)
    redis.call('HSET', DATA, id, ARGV[at + 3])
    know(id, attempt, HELD, lane[1])
    kept = kept + 1
  end
  at = at + 5
end
return kept
