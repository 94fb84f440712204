//! Until when a certificate is good: the one field of it that is looked at before it fails.

use rustls::pki_types::CertificateDer;
use time::{Date, Month, PrimitiveDateTime, Time};

use crate::clock::Micros;

/// When the certificate ends; `None` where it is not one.
pub(super) fn end(certificate: &CertificateDer<'_>) -> Option<Micros> {
    // Certificate and TBSCertificate are sequences.
    let (_, outer, _) = element(certificate)?;
    let (_, mut rest, _) = element(outer)?;
    let mut next = || {
        let (tag, content, after) = element(rest)?;
        rest = after;
        Some((tag, content))
    };
    // The version is there or not; then serial number, algorithm, issuer, validity.
    let (first, _) = next()?;
    for _ in 0..(if first == 0xa0 { 3 } else { 2 }) {
        next()?;
    }
    let (_, validity) = next()?;
    let (_, _, after) = element(validity)?;
    let (tag, text, _) = element(after)?;
    moment(tag, std::str::from_utf8(text).ok()?)
}

/// Tag and content of the first element, and what comes after it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        if digits.len() > 4 {
            return None;
        }
        (digits.iter().fold(0, |sum, digit| (sum << 8) | usize::from(*digit)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// `YYMMDDHHMMSSZ` as a `UTCTime`, `YYYYMMDDHHMMSSZ` as a `GeneralizedTime`.
fn moment(tag: u8, text: &str) -> Option<Micros> {
    let digits = text.strip_suffix('Z')?;
    let (year, rest) = match tag {
        0x17 => {
            let (year, rest) = digits.split_at_checked(2)?;
            let year: i32 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        0x18 => {
            let (year, rest) = digits.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    let part = |at: usize| rest.get(2 * at..2 * at + 2)?.parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    let time = Time::from_hms(part(2)?, part(3)?, part(4)?).ok()?;
    let seconds = PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp();
    seconds.checked_mul(1_000_000).map(Micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_the_one_it_was_made_with() {
        for (year, month, day) in [(2031, 2, 3), (2049, 12, 31), (2050, 1, 1), (2999, 6, 15)] {
            let mut params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, month, day);
            let seconds = params.not_after.unix_timestamp();
            let key = rcgen::KeyPair::generate().unwrap();
            let made = params.self_signed(&key).unwrap();
            assert_eq!(end(made.der()), Some(Micros(seconds * 1_000_000)), "{year}");
            for cut in 0..made.der().len() {
                // Nothing that is not whole makes it panic.
                let _ = end(&CertificateDer::from(&made.der()[..cut]));
            }
        }
    }
}
