//! Values that JSON writes as strings, by the rules of the protobuf JSON mapping.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose},
};

/// Padding and unused bits are as the sender likes.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// Seconds of 0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z.
const TIMES: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// About ten thousand years, as the mapping allows.
const MAX_DURATION: i64 = 315_576_000_000;

/// Bytes of base64, of either alphabet, padded or not.
pub fn bytes(text: &str) -> Option<Vec<u8>> {
    let url_safe = text.bytes().any(|byte| matches!(byte, b'-' | b'_'));
    if url_safe { URL_SAFE.decode(text).ok() } else { STANDARD.decode(text).ok() }
}

/// Appends base64.
pub fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    // Four characters for every three bytes begun.
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let written = general_purpose::STANDARD.encode_slice(bytes, &mut out[start..]);
    out.truncate(start + written.unwrap_or(0));
}

/// A whole number, also when it is written with a fraction of zeros or an exponent.
pub fn integer(text: &str) -> Option<i128> {
    if let Ok(value) = text.parse::<i64>()
        && !text.starts_with('+')
        && is_number(text)
    {
        return Some(value.into());
    }
    if !is_number(text) {
        return None;
    }
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match rest.find(['e', 'E']) {
        Some(at) => (&rest[..at], rest[at + 1..].parse::<i32>().ok()?),
        None => (rest, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut digits = format!("{whole}{fraction}");
    let shift = exponent.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    if shift < 0 {
        let cut = digits.len().saturating_sub(usize::try_from(-shift).ok()?);
        if digits[cut..].bytes().any(|digit| digit != b'0') {
            return None;
        }
        digits.truncate(cut);
    } else if digits.bytes().any(|digit| digit != b'0') {
        // No integer type has more digits.
        let zeros = usize::try_from(shift).ok().filter(|zeros| *zeros <= 20)?;
        digits.extend(std::iter::repeat_n('0', zeros));
    }
    let digits = digits.trim_start_matches('0');
    let value: i128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    Some(if negative { -value } else { value })
}

/// A floating-point number, or one of the names that JSON has no number for.
pub fn float(text: &str) -> Option<f64> {
    match text {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ if is_number(text) => text.parse().ok().filter(|value: &f64| value.is_finite()),
        _ => None,
    }
}

/// Whether it is a number by the grammar of JSON.
fn is_number(text: &str) -> bool {
    let digits =
        |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let rest = text.strip_prefix('-').unwrap_or(text);
    let whole = digits(rest);
    if whole == 0 || (whole > 1 && rest.starts_with('0')) {
        return false;
    }
    let mut rest = &rest[whole..];
    if let Some(fraction) = rest.strip_prefix('.') {
        let n = digits(fraction);
        if n == 0 {
            return false;
        }
        rest = &fraction[n..];
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        let n = digits(exponent);
        return n > 0 && n == exponent.len();
    }
    rest.is_empty()
}

/// Appends a floating-point number; whole ones without a fraction.
pub fn put_float(value: f64, shortest: &dyn std::fmt::Debug, out: &mut Vec<u8>) {
    use std::io::Write as _;
    // Writing to a vector does not fail.
    let _ = if value.is_nan() {
        out.write_all(b"\"NaN\"")
    } else if value.is_infinite() {
        out.write_all(if value > 0.0 { b"\"Infinity\"" } else { b"\"-Infinity\"" })
    } else if value == 0.0 && value.is_sign_negative() {
        out.write_all(b"-0")
    } else if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
        out.write_all(itoa::Buffer::new().format(value as i64).as_bytes())
    } else {
        write!(out, "{shortest:?}")
    };
}

/// Seconds and nanoseconds of an RFC 3339 time between the years 1 and 9999.
pub fn timestamp(text: &str) -> Option<(i64, i32)> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = bytes.get(from..to)?;
        digits.iter().try_fold(0, |sum, byte| {
            byte.is_ascii_digit().then(|| sum * 10 + i64::from(byte - b'0'))
        })
    };
    let is = |at: usize, byte: u8| bytes.get(at) == Some(&byte);
    if !(is(4, b'-') && is(7, b'-') && is(10, b'T') && is(13, b':') && is(16, b':')) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let days = days_of_month(year, month)?;
    if !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let (nanos, at) = if is(19, b'.') {
        let end = 20 + bytes[20..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        (nanos(bytes.get(20..end)?)?, end)
    } else {
        (0, 19)
    };
    let offset = match *bytes.get(at)? {
        b'Z' if bytes.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if bytes.len() == at + 6 && is(at + 3, b':') => {
            let (hours, minutes) = (number(at + 1, at + 3)?, number(at + 4, at + 6)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = hours * 3_600 + minutes * 60;
            if sign == b'+' { offset } else { -offset }
        }
        _ => return None,
    };
    let seconds = days_from_civil(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    let seconds = seconds - offset;
    TIMES.contains(&seconds).then_some((seconds, nanos))
}

/// Appends an RFC 3339 time in UTC with 0, 3, 6 or 9 digits of the second; `None` outside the
/// years 1 to 9999.
pub fn put_timestamp(seconds: i64, nanos: i32, out: &mut Vec<u8>) -> Option<()> {
    if !TIMES.contains(&seconds) || !(0..1_000_000_000).contains(&nanos) {
        return None;
    }
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    put_digits(year, 4, out);
    for (separator, value) in [
        (b'-', month),
        (b'-', day),
        (b'T', rest / 3_600),
        (b':', rest / 60 % 60),
        (b':', rest % 60),
    ] {
        out.push(separator);
        put_digits(value, 2, out);
    }
    put_fraction(nanos.unsigned_abs(), out);
    out.push(b'Z');
    Some(())
}

/// Seconds and nanoseconds, of one sign, of a duration such as `-1.5s`.
pub fn duration(text: &str) -> Option<(i64, i32)> {
    let number = text.strip_suffix('s')?;
    let (negative, number) = match number.strip_prefix('-') {
        Some(number) => (true, number),
        None => (false, number),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, nanos(fraction.as_bytes())?),
        None => (number, 0),
    };
    if whole.is_empty() || whole.len() > 12 || !whole.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    if seconds > MAX_DURATION || (seconds == MAX_DURATION && fraction > 0) {
        return None;
    }
    Some(if negative { (-seconds, -fraction) } else { (seconds, fraction) })
}

/// Appends a duration with 0, 3, 6 or 9 digits of the second; `None` outside the range, and
/// when the signs differ.
pub fn put_duration(seconds: i64, nanos: i32, out: &mut Vec<u8>) -> Option<()> {
    let signs_differ = (seconds > 0 && nanos < 0) || (seconds < 0 && nanos > 0);
    if signs_differ || seconds.abs() > MAX_DURATION || nanos.abs() > 999_999_999 {
        return None;
    }
    if seconds < 0 || nanos < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(itoa::Buffer::new().format(seconds.unsigned_abs()).as_bytes());
    put_fraction(nanos.unsigned_abs(), out);
    out.push(b's');
    Some(())
}

/// Paths of a field mask, from the JSON form `a,bC.d`.
pub fn field_mask(text: &str) -> Option<Vec<String>> {
    if text.is_empty() {
        return Some(Vec::new());
    }
    text.split(',')
        .map(|path| {
            let mut snake = String::with_capacity(path.len() + 4);
            for c in path.chars() {
                match c {
                    '_' => return None,
                    'A'..='Z' => {
                        snake.push('_');
                        snake.push(c.to_ascii_lowercase());
                    }
                    _ => snake.push(c),
                }
            }
            (!snake.is_empty()).then_some(snake)
        })
        .collect()
}

/// Appends the JSON form of a field mask's path; `None` for one that would not come back.
pub fn put_field_mask_path(path: &str, out: &mut String) -> Option<()> {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '_' => out.push(chars.next().filter(char::is_ascii_lowercase)?.to_ascii_uppercase()),
            'A'..='Z' | ',' => return None,
            _ => out.push(c),
        }
    }
    Some(())
}

/// One to nine digits behind the point, as nanoseconds.
fn nanos(digits: &[u8]) -> Option<i32> {
    if !(1..=9).contains(&digits.len()) {
        return None;
    }
    let mut value = 0;
    for i in 0..9 {
        let digit = match digits.get(i) {
            Some(byte) if byte.is_ascii_digit() => i32::from(byte - b'0'),
            Some(_) => return None,
            None => 0,
        };
        value = value * 10 + digit;
    }
    Some(value)
}

fn put_fraction(nanos: u32, out: &mut Vec<u8>) {
    let (value, width) = match nanos {
        0 => return,
        n if n % 1_000_000 == 0 => (n / 1_000_000, 3),
        n if n % 1_000 == 0 => (n / 1_000, 6),
        n => (n, 9),
    };
    out.push(b'.');
    put_digits(value.into(), width, out);
}

fn put_digits(value: i64, width: usize, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + width, b'0');
    let mut rest = value;
    for digit in out[start..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
}

fn days_of_month(year: i64, month: i64) -> Option<i64> {
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    Some(match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        _ => return None,
    })
}

/// Days since 1970-01-01 of the proleptic Gregorian calendar: years begin in March, so that
/// the day that comes and goes is their last.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(put: impl FnOnce(&mut Vec<u8>) -> Option<()>) -> Option<String> {
        let mut out = Vec::new();
        put(&mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn whole_numbers_are_read_exactly_in_every_spelling() {
        for (text, value) in [
            ("0", 0),
            ("-0", 0),
            ("1e3", 1_000),
            ("1.0", 1),
            ("1.50e1", 15),
            ("100e-2", 1),
            ("0e99999", 0),
            ("-12E+2", -1_200),
            ("18446744073709551615", i128::from(u64::MAX)),
            ("9223372036854775807.0", i128::from(i64::MAX)),
        ] {
            assert_eq!(integer(text), Some(value), "{text}");
        }
        for text in
            ["", "1.5", "1e-1", "+1", " 1", "1 ", "01", "0x1", "1e", "1e99", ".5", "5.", "--1"]
        {
            assert_eq!(integer(text), None, "{text}");
        }
    }

    #[test]
    fn times_outside_the_calendar_are_refused() {
        for text in [
            "2024-02-30T00:00:00Z",
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-01-01t00:00:00Z",
            "2024-01-01T00:00:00z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:60Z",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00.1234567890Z",
            "2024-01-01T00:00:00+0100",
            "0000-12-31T23:59:59Z",
            "9999-12-31T23:59:59-00:01",
            "2024-01-01",
        ] {
            assert_eq!(timestamp(text), None, "{text}");
        }
        assert_eq!(timestamp("2024-02-29T01:00:00.5+01:00"), Some((1_709_164_800, 500_000_000)));
    }

    #[test]
    fn masks_that_would_not_come_back_are_not_written() {
        for path in ["a__b", "a_1", "aB", "a_"] {
            assert_eq!(put_field_mask_path(path, &mut String::new()), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn times_survive(seconds in TIMES, nanos in 0_i32..1_000_000_000) {
            let text = written(|out| put_timestamp(seconds, nanos, out)).unwrap();
            prop_assert_eq!(timestamp(&text), Some((seconds, nanos)), "{}", text);
            let known = prost_types::Timestamp { seconds, nanos };
            prop_assert_eq!(text.parse(), Ok(known));
        }

        #[test]
        fn durations_survive(seconds in -MAX_DURATION + 1..MAX_DURATION, nanos in 0_i32..1_000_000_000) {
            let nanos = if seconds < 0 { -nanos } else { nanos };
            let text = written(|out| put_duration(seconds, nanos, out)).unwrap();
            prop_assert_eq!(duration(&text), Some((seconds, nanos)), "{}", text);
        }

        #[test]
        fn floats_survive(value: f64, single: f32) {
            let mut out = Vec::new();
            put_float(value, &value, &mut out);
            let text = String::from_utf8(out).unwrap();
            let back = float(text.trim_matches('"')).unwrap();
            prop_assert!(back.to_bits() == value.to_bits() || (back.is_nan() && value.is_nan()), "{text}");
            let mut out = Vec::new();
            put_float(single.into(), &single, &mut out);
            let text = String::from_utf8(out).unwrap();
            let back = float(text.trim_matches('"')).unwrap() as f32;
            prop_assert!(back.to_bits() == single.to_bits() || (back.is_nan() && single.is_nan()), "{text}");
        }

        #[test]
        fn bytes_survive_in_both_alphabets(bytes: Vec<u8>) {
            let mut out = Vec::new();
            put_bytes(&bytes, &mut out);
            let text = String::from_utf8(out).unwrap();
            prop_assert_eq!(super::bytes(&text), Some(bytes.clone()));
            let url = text.replace('+', "-").replace('/', "_").replace('=', "");
            prop_assert_eq!(super::bytes(&url), Some(bytes));
        }

        #[test]
        fn no_text_is_too_strange(text in ".{0,40}") {
            let _ = (integer(&text), float(&text), timestamp(&text), duration(&text), field_mask(&text));
        }
    }
}
