-- Says which data these are: an id that lasts as long as they do. ARGV: id for new ones.
redis.call('SET', ERA, ARGV[1], 'NX')
return redis.call('GET', ERA)
