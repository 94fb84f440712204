-- Lists items as dead and takes them out. ARGV: milliseconds that the list keeps them, (id,
-- reason)*.
local oldest = whole(math.max(0, now_ms() - tonumber(ARGV[1])))
for at = 2, #ARGV, 2 do
  local id = ARGV[at]
  redis.call('XADD', P .. 'dead', 'MINID', '~', oldest, '*', 'i', id, 'r', ARGV[at + 1])
  local _, place, lane = find(id)
  if place then
    take_out(id, place, lane)
    forget(id, lane)
  end
end
return (#ARGV - 1) / 2
