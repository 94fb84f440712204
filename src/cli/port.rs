//! Who holds a port.

use std::net::SocketAddr;

/// The process that listens on a port, where `/proc` lets this user see it.
pub fn holder(addr: SocketAddr) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .flat_map(|table| listening(&table, addr.port()))
        .collect();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let holds = descriptors.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(
            |target| {
                let target = target.to_string_lossy().into_owned();
                inodes.iter().any(|inode| target == format!("socket:[{inode}]"))
            },
        );
        if holds {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("`{}` (process {pid})", name.trim()));
        }
    }
    None
}

/// Inodes of the sockets in a `/proc/net/tcp` table that listen on a port.
fn listening(table: &str, port: u16) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut columns = line.split_whitespace();
            let (local, state) = (columns.nth(1)?, columns.nth(1)?);
            let inode = columns.nth(5)?;
            (local.ends_with(&suffix) && state == "0A").then(|| inode.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_port_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = holder(listener.local_addr().unwrap()).unwrap();
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1B9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 111 1\n\
            1: 0100007F:1B9E 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000  0 0 222 1\n\
            2: 0100007F:1B9F 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 333 1\n";
        assert_eq!(listening(table, 7070), ["111"]);
    }
}
