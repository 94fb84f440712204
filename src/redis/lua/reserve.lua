-- Promises room in the accounts and groups of lanes. ARGV: milliseconds until a promise lapses,
-- (lane, id, limit of the account, limit of the group, band or -1)*. Where there is none, the item
-- that waits longest in the lowest band, up to the band given, makes room. Replies for each: 1 when
-- granted, 0 when the account is full, -1 when the group is; the depth that was in the way; the id
-- that left, or nothing.
local function lowest(is_there, most)
  local found = nil
  for _, lane in ipairs(redis.call('ZRANGE', LANES, 0, -1)) do
    local band = tonumber(string.match(lane, ':(%d+)$'))
    if band <= most and is_there(lane) and (not found or band <= found.band) then
      local entry = next_of(lane)
      if entry then
        local time, number = string.match(entry[1], '^(%d+)-(%d+)$')
        time, number = tonumber(time), tonumber(number)
        local older = found and (time < found.time or time == found.time and number < found.number)
        if not found or band < found.band or older then
          found = { lane = lane, band = band, time = time, number = number, entry = entry }
        end
      end
    end
  end
  return found
end

-- Takes an item out to make room; its id, or false where there is none to take.
local function evict(is_there, most)
  local found = lowest(is_there, most)
  if not found then return false end
  local id = found.entry[2][2]
  local _, place, lane = find(id)
  if place ~= found.entry[1] or lane ~= found.lane then return false end
  end_entry(lane, place)
  forget(id, lane)
  return id
end

local until_ms, reply = whole(now_ms() + tonumber(ARGV[1])), {}
for at = 2, #ARGV, 5 do
  local lane, id, most = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 4])
  local outcome, depth, left = 1, 0, false
  if not find(id) then
    local here = tonumber(redis.call('HGET', DEPTH, account(lane)) or '0')
    local all = tonumber(redis.call('HGET', GROUPS, group(lane)) or '0')
    local is_there = nil
    if here >= tonumber(ARGV[at + 2]) then
      outcome, depth = 0, here
      is_there = function(other) return account(other) == account(lane) end
    elseif all >= tonumber(ARGV[at + 3]) then
      outcome, depth = -1, all
      is_there = function(other) return group(other) == group(lane) end
    end
    if outcome ~= 1 and most >= 0 then
      left = evict(is_there, most)
      if left then outcome = 1 end
    end
    if outcome == 1 then
      count(lane, 1)
      redis.call('ZADD', RESERVED, until_ms, id)
      know(id, 0, PROMISED, lane)
    end
  end
  reply[#reply + 1] = outcome
  reply[#reply + 1] = depth
  reply[#reply + 1] = left
end
return reply
