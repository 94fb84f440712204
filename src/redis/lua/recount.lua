-- Counts the depths anew when they do not add up to the ids known, which only happens when one of
-- the two keys went without the other. Replies with 1 when they were counted.
local sum = 0
for _, depth in ipairs(redis.call('HVALS', DEPTH)) do sum = sum + depth end
if sum == redis.call('HLEN', KNOWN) then return 0 end
local whole_depths, known = {}, redis.call('HGETALL', KNOWN)
for at = 2, #known, 2 do
  local field = account(string.match(known[at], '^%d+ %S+ (.*)$'))
  whole_depths[field] = (whole_depths[field] or 0) + 1
end
redis.call('DEL', DEPTH)
for field, depth in pairs(whole_depths) do redis.call('HSET', DEPTH, field, whole(depth)) end
return 1
