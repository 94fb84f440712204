-- Says how many entries are before an item in its lane. ARGV: id, most to count. Replies: lane and
-- number; nothing when the item is in no lane.
local _, place, lane = find(ARGV[1])
if not place or place == PROMISED or place == HELD then return false end
local before = redis.call('XRANGE', stream(lane), '-', '(' .. place, 'COUNT', ARGV[2])
return { lane, #before }
