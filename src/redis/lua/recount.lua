-- Counts the depths anew when they do not add up to the ids known, which only happens when one of
-- the keys went without the others. Replies with 1 when they were counted.
local function sum(key)
  local total = 0
  for _, depth in ipairs(redis.call('HVALS', key)) do total = total + depth end
  return total
end

local n_known = redis.call('HLEN', KNOWN)
if sum(DEPTH) == n_known and sum(GROUPS) == n_known then return 0 end
local by_account, by_group, known = {}, {}, redis.call('HGETALL', KNOWN)
for at = 2, #known, 2 do
  local lane = string.match(known[at], '^%d+ %S+ (.*)$')
  local one, all = account(lane), group(lane)
  by_account[one] = (by_account[one] or 0) + 1
  by_group[all] = (by_group[all] or 0) + 1
end
redis.call('DEL', DEPTH, GROUPS)
for field, depth in pairs(by_account) do redis.call('HSET', DEPTH, field, whole(depth)) end
for field, depth in pairs(by_group) do redis.call('HSET', GROUPS, field, whole(depth)) end
return 1
