//! The JSON mapping, case by case: the specification's table and the conformance suite's inputs.

use prost_reflect::DynamicMessage;

use super::{POOL, mapping, read, write};

/// JSON of `library.All`, and how the same message is written; empty for "the same".
pub const ACCEPTED: &[(&str, &str)] = &[
    // Objects.
    (r"{}", ""),
    (" { } ", "{}"),
    (r#"{"aBool":true}"#, ""),
    (r#"{"a_bool":true}"#, r#"{"aBool":true}"#),
    (r#"{"aBool":false}"#, "{}"),
    (r#"{"aBool":null}"#, "{}"),
    (r#"{"@odd-Name":"x"}"#, ""),
    (r#"{"renamed":"x"}"#, r#"{"@odd-Name":"x"}"#),
    (r#"{"Leading":"x"}"#, ""),
    (r#"{"_leading":"x"}"#, r#"{"Leading":"x"}"#),
    // Integers.
    (r#"{"anInt32":1}"#, ""),
    (r#"{"anInt32":-2147483648}"#, ""),
    (r#"{"anInt32":2147483647}"#, ""),
    (r#"{"anInt32":"17"}"#, r#"{"anInt32":17}"#),
    (r#"{"anInt32":1e3}"#, r#"{"anInt32":1000}"#),
    (r#"{"anInt32":1.0}"#, r#"{"anInt32":1}"#),
    (r#"{"anInt32":"1e2"}"#, r#"{"anInt32":100}"#),
    (r#"{"anInt32":-0}"#, "{}"),
    (r#"{"anInt64":"9223372036854775807"}"#, ""),
    (r#"{"anInt64":-9223372036854775808}"#, r#"{"anInt64":"-9223372036854775808"}"#),
    (r#"{"anInt64":9007199254740993}"#, r#"{"anInt64":"9007199254740993"}"#),
    (r#"{"anInt64":"1e3"}"#, r#"{"anInt64":"1000"}"#),
    (r#"{"anInt64":"9223372036854775807.0"}"#, r#"{"anInt64":"9223372036854775807"}"#),
    (r#"{"aUint32":4294967295}"#, ""),
    (r#"{"aUint64":"18446744073709551615"}"#, ""),
    (r#"{"aUint64":18446744073709551615}"#, r#"{"aUint64":"18446744073709551615"}"#),
    (r#"{"aSint32":-1}"#, ""),
    (r#"{"aSint32":-2147483648}"#, ""),
    (r#"{"aSint64":"-9223372036854775808"}"#, ""),
    (r#"{"aFixed32":4294967295}"#, ""),
    (r#"{"aFixed64":"18446744073709551615"}"#, ""),
    (r#"{"aSfixed32":-5}"#, ""),
    (r#"{"aSfixed64":"-5"}"#, ""),
    // Floating point.
    (r#"{"aFloat":1.5}"#, ""),
    (r#"{"aFloat":"NaN"}"#, ""),
    (r#"{"aFloat":"Infinity"}"#, ""),
    (r#"{"aFloat":"-Infinity"}"#, ""),
    (r#"{"aFloat":3.4e38}"#, ""),
    (r#"{"aFloat":0.1}"#, ""),
    (r#"{"aFloat":"0.5"}"#, r#"{"aFloat":0.5}"#),
    (r#"{"aDouble":5}"#, ""),
    (r#"{"aDouble":5.0}"#, r#"{"aDouble":5}"#),
    (r#"{"aDouble":1.7976931348623157e308}"#, ""),
    (r#"{"aDouble":1e-7}"#, ""),
    (r#"{"aDouble":-0.0}"#, r#"{"aDouble":-0}"#),
    (r#"{"aDouble":"-1.25e2"}"#, r#"{"aDouble":-125}"#),
    (r#"{"aDouble":"NaN"}"#, ""),
    // Strings.
    (r#"{"aString":"a"}"#, ""),
    (r#"{"aString":""}"#, "{}"),
    (r#"{"aString":"\"\\\/\b\f\n\r\t"}"#, r#"{"aString":"\"\\/\b\f\n\r\t"}"#),
    (r#"{"aString":"\u0001\u00e9"}"#, r#"{"aString":"\u0001é"}"#),
    (r#"{"aString":"\ud83d\ude00"}"#, r#"{"aString":"😀"}"#),
    // Bytes.
    (r#"{"aBytes":"AQI="}"#, ""),
    (r#"{"aBytes":"AQI"}"#, r#"{"aBytes":"AQI="}"#),
    (r#"{"aBytes":"-_"}"#, r#"{"aBytes":"+w=="}"#),
    (r#"{"aBytes":"_-8="}"#, r#"{"aBytes":"/+8="}"#),
    // Enums.
    (r#"{"color":"COLOR_RED"}"#, ""),
    (r#"{"color":"COLOR_ROUGE"}"#, r#"{"color":"COLOR_RED"}"#),
    (r#"{"color":2}"#, r#"{"color":"COLOR_BLUE"}"#),
    (r#"{"color":2.0}"#, r#"{"color":"COLOR_BLUE"}"#),
    (r#"{"color":77}"#, ""),
    (r#"{"color":-1}"#, r#"{"color":"COLOR_COLD"}"#),
    (r#"{"color":"COLOR_UNSPECIFIED"}"#, "{}"),
    // Messages.
    (r#"{"inner":{}}"#, ""),
    (r#"{"inner":null}"#, "{}"),
    (r#"{"inner":{"name":"a","inner":{"count":1}}}"#, ""),
    (r#"{"empty":{}}"#, ""),
    // Lists.
    (r#"{"ints":[1,2,-3]}"#, ""),
    (r#"{"ints":[]}"#, "{}"),
    (r#"{"ints":null}"#, "{}"),
    (r#"{"longs":["1",2]}"#, r#"{"longs":["1","2"]}"#),
    (r#"{"doubles":[0,"NaN",1.5]}"#, ""),
    (r#"{"strings":["","a"]}"#, ""),
    (r#"{"colors":["COLOR_BLUE",1]}"#, r#"{"colors":["COLOR_BLUE","COLOR_RED"]}"#),
    (r#"{"inners":[{},{"name":"x"}]}"#, ""),
    (r#"{"blobs":["","AQ=="]}"#, ""),
    (r#"{"unpacked":[0,1]}"#, ""),
    (r#"{"zigzags":["-1","1"]}"#, ""),
    (r#"{"fixeds":[7,0]}"#, ""),
    (r#"{"times":["1970-01-01T00:00:00Z"]}"#, ""),
    // Maps.
    (r#"{"byString":{"a":"b"}}"#, ""),
    (r#"{"byString":{"":""}}"#, ""),
    (r#"{"byString":{}}"#, "{}"),
    (r#"{"byString":null}"#, "{}"),
    (r#"{"byInt32":{"-5":{"name":"x"}}}"#, ""),
    (r#"{"byBool":{"true":"1"}}"#, ""),
    (r#"{"byUint64":{"18446744073709551615":"COLOR_RED"}}"#, ""),
    (r#"{"bySint32":{"-1":"AQ=="}}"#, ""),
    (r#"{"doublesByName":{"x":0}}"#, ""),
    // Presence.
    (r#"{"maybeInt":0}"#, ""),
    (r#"{"maybeInt":null}"#, "{}"),
    (r#"{"maybeString":""}"#, ""),
    (r#"{"maybeColor":"COLOR_UNSPECIFIED"}"#, ""),
    // Oneofs.
    (r#"{"choiceInt":0}"#, ""),
    (r#"{"choiceString":""}"#, ""),
    (r#"{"choiceInner":{}}"#, ""),
    (r#"{"choiceNull":null}"#, ""),
    (r#"{"choiceNull":"NULL_VALUE"}"#, r#"{"choiceNull":null}"#),
    (r#"{"choiceValue":null}"#, ""),
    (r#"{"choiceInt":1,"choiceString":null}"#, r#"{"choiceInt":1}"#),
    // Times.
    (r#"{"time":"1970-01-01T00:00:00Z"}"#, ""),
    (r#"{"time":"2024-02-29T12:34:56.789Z"}"#, ""),
    (r#"{"time":"2024-02-29T12:34:56.1Z"}"#, r#"{"time":"2024-02-29T12:34:56.100Z"}"#),
    (r#"{"time":"2024-02-29T12:34:56.123456Z"}"#, ""),
    (r#"{"time":"2024-02-29T12:34:56.000000001Z"}"#, ""),
    (r#"{"time":"2024-03-01T01:00:00+01:00"}"#, r#"{"time":"2024-03-01T00:00:00Z"}"#),
    (r#"{"time":"0001-01-01T00:00:00Z"}"#, ""),
    (r#"{"time":"9999-12-31T23:59:59.999999999Z"}"#, ""),
    (r#"{"time":null}"#, "{}"),
    // Durations.
    (r#"{"wait":"0s"}"#, ""),
    (r#"{"wait":"1.5s"}"#, r#"{"wait":"1.500s"}"#),
    (r#"{"wait":"-0.000000001s"}"#, ""),
    (r#"{"wait":"315576000000s"}"#, ""),
    (r#"{"wait":"-315576000000s"}"#, ""),
    // Field masks.
    (r#"{"mask":"aB,c.dE"}"#, ""),
    (r#"{"mask":""}"#, ""),
    // Any JSON.
    (r#"{"object":{"a":1,"b":[null,true,"x",{"c":-1.5}]}}"#, ""),
    (r#"{"object":{}}"#, ""),
    (r#"{"value":null}"#, ""),
    (r#"{"value":1}"#, ""),
    (r#"{"value":"x"}"#, ""),
    (r#"{"value":[1,[],{}]}"#, ""),
    (r#"{"value":{"a":null}}"#, ""),
    (r#"{"values":[null,1,"a"]}"#, ""),
    (r#"{"list":[null,false]}"#, ""),
    (r#"{"list":[]}"#, ""),
    (r#"{"nothing":null}"#, "{}"),
    // Any message.
    (r#"{"any":{}}"#, ""),
    (r#"{"any":{"@type":"type.googleapis.com/library.Inner","name":"x"}}"#, ""),
    (
        r#"{"any":{"name":"x","@type":"type.googleapis.com/library.Inner"}}"#,
        r#"{"any":{"@type":"type.googleapis.com/library.Inner","name":"x"}}"#,
    ),
    (r#"{"any":{"@type":"type.googleapis.com/google.protobuf.Duration","value":"1s"}}"#, ""),
    (r#"{"any":{"@type":"type.googleapis.com/google.protobuf.Value","value":[1]}}"#, ""),
    (r#"{"any":{"@type":"type.googleapis.com/google.protobuf.Int32Value","value":3}}"#, ""),
    (
        r#"{"any":{"@type":"x/google.protobuf.Any","value":{"@type":"x/library.Inner","count":1}}}"#,
        "",
    ),
    // Wrappers.
    (r#"{"wrappedBool":false}"#, ""),
    (r#"{"wrappedInt32":0}"#, ""),
    (r#"{"wrappedInt32":null}"#, "{}"),
    (r#"{"wrappedInt64":"5"}"#, ""),
    (r#"{"wrappedUint32":7}"#, ""),
    (r#"{"wrappedUint64":"0"}"#, ""),
    (r#"{"wrappedFloat":0.5}"#, ""),
    (r#"{"wrappedDouble":"Infinity"}"#, ""),
    (r#"{"wrappedString":""}"#, ""),
    (r#"{"wrappedBytes":"AQI="}"#, ""),
];

/// JSON that is no `library.All`, with the field and a part of what is said about it.
pub const REFUSED: &[(&str, &str, &str)] = &[
    ("", "", "is not JSON"),
    ("{", "", "is not JSON"),
    ("{} {}", "", "is not JSON"),
    (r#"{"aBool":true,}"#, "", "is not JSON"),
    (r"{'aBool':true}", "", "is not JSON"),
    (r#"{"aString":"\ud83d"}"#, "", "is not JSON"),
    (r#"{"aDouble":NaN}"#, "", "is not JSON"),
    (r#"{"anInt32":01}"#, "", "is not JSON"),
    ("[]", "", "must not be a list"),
    ("null", "", "must be an object"),
    ("1", "", "must be an object"),
    (r#"{"aBool":true,"aBool":true}"#, "a_bool", "is given twice"),
    (r#"{"aBool":true,"a_bool":true}"#, "a_bool", "is given twice"),
    (r#"{"aBol":true}"#, "aBol", "did you mean `aBool`"),
    (r#"{"inner":{"nmae":"x"}}"#, "inner.nmae", "did you mean `name`"),
    (r#"{"zzz":1}"#, "zzz", "is no field here"),
    (r#"{"empty":{"a":1}}"#, "empty.a", "is no field here"),
    (r#"{"aBool":"true"}"#, "a_bool", "true or false"),
    (r#"{"aBool":1}"#, "a_bool", "true or false"),
    (r#"{"anInt32":2147483648}"#, "an_int32", "2147483647"),
    (r#"{"anInt32":-2147483649}"#, "an_int32", "-2147483648"),
    (r#"{"anInt32":0.5}"#, "an_int32", "whole number"),
    (r#"{"anInt32":" 1"}"#, "an_int32", "whole number"),
    (r#"{"anInt32":"0x1"}"#, "an_int32", "whole number"),
    (r#"{"anInt32":true}"#, "an_int32", "whole number"),
    (r#"{"anInt32":[1]}"#, "an_int32", "must not be a list"),
    (r#"{"anInt64":"9223372036854775808"}"#, "an_int64", "whole number"),
    (r#"{"aUint32":-1}"#, "a_uint32", "whole number"),
    (r#"{"aUint64":18446744073709551616}"#, "a_uint64", "whole number"),
    (r#"{"aFloat":3.5e38}"#, "a_float", "single-precision"),
    (r#"{"aFloat":"inf"}"#, "a_float", "must be a number"),
    (r#"{"aDouble":1e400}"#, "", "is not JSON"),
    (r#"{"aDouble":"nan"}"#, "a_double", "must be a number"),
    (r#"{"aDouble":"1."}"#, "a_double", "must be a number"),
    (r#"{"aString":1}"#, "a_string", "must be a string"),
    (r#"{"aBytes":"!"}"#, "a_bytes", "base64"),
    (r#"{"aBytes":[1]}"#, "a_bytes", "must not be a list"),
    (r#"{"color":"RED"}"#, "color", "must be one of"),
    (r#"{"color":"COLOR_BLEU"}"#, "color", "did you mean `COLOR_BLUE`"),
    (r#"{"color":1.5}"#, "color", "must be one of"),
    (r#"{"color":"1"}"#, "color", "must be one of"),
    (r#"{"color":2147483648}"#, "color", "must be one of"),
    (r#"{"inner":[]}"#, "inner", "must not be a list"),
    (r#"{"inner":"x"}"#, "inner", "must be an object"),
    (r#"{"ints":1}"#, "ints", "must be a list"),
    (r#"{"ints":{}}"#, "ints", "must be a list"),
    (r#"{"ints":[1,null]}"#, "ints[1]", "must not be null"),
    (r#"{"ints":[1,[2]]}"#, "ints[1]", "must not be a list"),
    (r#"{"inners":[{},{"count":"x"}]}"#, "inners[1].count", "whole number"),
    (r#"{"byString":[]}"#, "by_string", "must be an object"),
    (r#"{"byString":{"a":null}}"#, "by_string[a]", "must not be null"),
    (r#"{"byString":{"a":1}}"#, "by_string[a]", "must be a string"),
    (r#"{"byString":{"a":"1","a":"2"}}"#, "by_string[a]", "is given twice"),
    (r#"{"byInt32":{"x":{}}}"#, "by_int32[x]", "whole number"),
    (r#"{"byInt32":{"1":{"nmae":1}}}"#, "by_int32[1].nmae", "did you mean"),
    (r#"{"byBool":{"yes":"1"}}"#, "by_bool[yes]", "true"),
    (r#"{"choiceInt":1,"choiceString":"x"}"#, "choice_string", "excludes `choice_int`"),
    (r#"{"choiceInt":1,"choiceNull":null}"#, "choice_null", "excludes `choice_int`"),
    (r#"{"time":"2024-02-30T00:00:00Z"}"#, "time", "must be a time"),
    (r#"{"time":0}"#, "time", "must be a time"),
    (r#"{"time":{"seconds":1}}"#, "time", "must not be an object"),
    (r#"{"wait":"1"}"#, "wait", "must be a duration"),
    (r#"{"wait":"1.5 s"}"#, "wait", "must be a duration"),
    (r#"{"wait":"315576000001s"}"#, "wait", "must be a duration"),
    (r#"{"wait":"1.0000000001s"}"#, "wait", "must be a duration"),
    (r#"{"wait":"+1s"}"#, "wait", "must be a duration"),
    (r#"{"mask":"a_b"}"#, "mask", "lowerCamelCase"),
    (r#"{"mask":["a"]}"#, "mask", "must not be a list"),
    (r#"{"object":[]}"#, "object", "must not be a list"),
    (r#"{"object":{"a":1,"a":2}}"#, "object.a", "is given twice"),
    (r#"{"list":{}}"#, "list", "must be a list"),
    (r#"{"any":{"name":"x"}}"#, "any.@type", "must name the type"),
    (r#"{"any":{"@type":"x/no.Such"}}"#, "any.@type", "names no known type"),
    (r#"{"any":{"@type":"x/library.Inner","zzz":1}}"#, "any.zzz", "is no field here"),
    (r#"{"any":{"@type":"x/library.Inner","name":"a","name":"b"}}"#, "any.name", "given twice"),
    (r#"{"wrappedInt32":"x"}"#, "wrapped_int32", "whole number"),
    (r#"{"wrappedString":{}}"#, "wrapped_string", "must not be an object"),
];

#[test]
fn json_is_read_and_written_as_the_mapping_says() {
    let described = POOL.get_message_by_name("library.All").unwrap();
    for (json, canonical) in ACCEPTED {
        let canonical = if canonical.is_empty() { json } else { canonical };
        let message = read("library.All", json).unwrap_or_else(|problem| {
            panic!("{json} is refused: {problem:?}");
        });
        assert_eq!(write("library.All", &message), *canonical, "{json}");
        // What was written is understood, and by another implementation too.
        let again = read("library.All", canonical).unwrap();
        assert_eq!(write("library.All", &again), *canonical);
        if *canonical == r#"{"any":{}}"# {
            // The other implementation has no JSON for an `Any` of nothing.
            continue;
        }
        let mut deserializer = serde_json::Deserializer::from_str(canonical);
        let other = DynamicMessage::deserialize(described.clone(), &mut deserializer).unwrap();
        let ours = DynamicMessage::decode(described.clone(), &*message).unwrap();
        // As JSON: their equality tells a default that was sent from one that was not.
        let [ours, other] = [ours, other].map(|message| serde_json::to_value(&message).unwrap());
        assert_eq!(ours, other, "{json}");
    }
}

#[test]
fn json_that_is_not_the_message_is_refused_with_the_path_of_the_field() {
    for (json, field, description) in REFUSED {
        let problem = match read("library.All", json) {
            Ok(message) => panic!("{json} is read as {}", write("library.All", &message)),
            Err(problem) => problem,
        };
        assert_eq!(problem.field, *field, "{json}: {}", problem.description);
        assert!(problem.description.contains(description), "{json}: {}", problem.description);
    }
}

#[test]
fn what_nests_deeper_than_decoders_follow_is_refused() {
    let described = POOL.get_message_by_name("library.All").unwrap();
    let nested = |n: usize| format!("{{\"value\":{}{}}}", "[".repeat(n), "]".repeat(n));
    let deepest = (1..100).take_while(|n| read("library.All", &nested(*n)).is_ok()).last();
    let deepest = deepest.expect("some depth is fine");
    assert!((30..60).contains(&deepest), "{deepest}");
    let message = read("library.All", &nested(deepest)).unwrap();
    DynamicMessage::decode(described, &*message).expect("decoders follow this far");
    let problem = read("library.All", &nested(deepest + 1)).unwrap_err();
    assert!(problem.description.contains("too deeply"), "{problem:?}");
    assert!(problem.field.starts_with("value[0][0]"), "{problem:?}");
}

#[test]
fn the_last_of_repeated_single_fields_counts_and_parts_of_messages_are_merged() {
    let part = |json: &str| read("library.All", json).unwrap();
    let message = [
        part(r#"{"inner":{"name":"a","count":1},"anInt32":1,"choiceInt":1,"aString":"late"}"#),
        part(r#"{"inner":{"name":"b","tags":["x"]},"anInt32":2,"choiceString":"s"}"#),
        part(r#"{"byString":{"k":"1","l":"2"},"ints":[1]}"#),
        part(r#"{"byString":{"k":"3"},"ints":[2]}"#),
    ]
    .concat();
    let expected = r#"{"anInt32":2,"aString":"late","inner":{"name":"b","count":1,"tags":["x"]},"ints":[1,2],"byString":{"k":"3","l":"2"},"choiceString":"s"}"#;
    assert_eq!(write("library.All", &message), expected);
}

#[test]
fn packed_and_unknown_fields_on_the_wire_are_understood() {
    // `ints` packed, then an empty run; `fixeds` packed; field 500, which nobody knows.
    let message = [0xa2, 1, 3, 1, 0x96, 1, 0xa2, 1, 0, 0xea, 1, 4, 7, 0, 0, 0, 0xa2, 0x1f, 1, 0x78];
    assert_eq!(write("library.All", &message), r#"{"ints":[1,150],"fixeds":[7]}"#);
    assert_eq!(write("library.All", &[0xa2, 1, 0]), "{}");
}

#[test]
fn a_message_without_a_json_form_is_an_error_and_never_a_panic() {
    let unwritable = |message: &[u8]| {
        let id = mapping().find("library.All").unwrap();
        assert!(mapping().write(id, message, &mut Vec::new()).is_err(), "{message:?}");
    };
    unwritable(&[8]);
    unwritable(&[0xff; 12]);
    unwritable(&[0x72, 2, 0xc3, 0x28]);
    // A time in the year 292277026596.
    unwritable(&[0x92, 3, 10, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
    // NaN, which a `Value` must not be.
    let nan = [&[0xb2, 3, 9, 0x11][..], &f64::NAN.to_le_bytes()].concat();
    unwritable(&nan);
}
