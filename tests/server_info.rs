//! `--server-info` writes port and PID to a file, never follows links, and removes the file on exit.

mod support;

use nix::unistd::geteuid;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use support::*;

fn start_with_info_file(file: &Path) -> Proxy {
    ProxyCommand::new().arg("--server-info").arg(file).start()
}

fn assert_info(file: &Path, proxy: &Proxy) {
    let expected = format!("{{\"port\":{},\"pid\":{}}}\n", proxy.port, proxy.pid());
    assert_eq!(fs::read_to_string(file).unwrap(), expected);
}

#[test]
fn info_file_is_one_json_line_removed_on_exit_if_unchanged() {
    let dir = TestDir::new();
    let file = dir.join("made/on/the/way/info.json");
    let others = "{\"port\":1,\"pid\":1}\n";
    let can_only_empty = cfg!(target_os = "linux") && geteuid().is_root();
    for unchanged in [true, false] {
        let proxy = start_with_info_file(&file);
        assert_info(&file, &proxy);
        let files = fs::read_dir(file.parent().unwrap()).unwrap().count();
        assert_eq!(files, 1, "the temporary file is removed");
        if !unchanged {
            fs::remove_file(&file).unwrap();
            fs::write(&file, others).unwrap();
        }
        assert_eq!(proxy.stop().status.code(), Some(0));
        let left = fs::read_to_string(&file).ok();
        // A program that was started as root has dropped root, and the directory belongs to root.
        let emptied = (unchanged && can_only_empty).then_some("");
        assert_eq!(left.as_deref(), emptied.or((!unchanged).then_some(others)));
    }
}

#[test]
fn existing_link_or_file_is_replaced_and_not_followed() {
    let dir = TestDir::new();
    let (file, precious) = (dir.join("info.json"), dir.join("precious"));
    fs::write(&precious, "untouched").unwrap();
    symlink(&precious, &file).unwrap();
    let proxy = start_with_info_file(&file);
    assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
    assert_info(&file, &proxy);
    drop(proxy);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "untouched");

    fs::write(&file, "{\"port\":1,\"pid\":1}\nand more\n".repeat(100)).unwrap();
    assert_info(&file, &start_with_info_file(&file));
}

#[test]
fn info_file_in_read_only_directory_is_written_in_place() {
    let what = "an info file in a read-only directory";
    for before in ["", &"{\"port\":1,\"pid\":1}\n".repeat(100)] {
        let dir = TestDir::new();
        let file = dir.join("info.json");
        write_shared(&file, before);
        let inode = fs::metadata(&file).unwrap().ino();
        let _read_only = ReadOnly::new(&dir);
        let Some(command) = unprivileged(what, ProxyCommand::new) else {
            return;
        };
        let proxy = command.arg("--server-info").arg(&file).start();
        assert_info(&file, &proxy);
        assert_eq!(fs::metadata(&file).unwrap().ino(), inode);
        // codex-action does this once the file has content.
        fs::set_permissions(&file, Permissions::from_mode(0o444)).unwrap();
        assert_eq!(proxy.stop().status.code(), Some(0));
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            "",
            "the file is emptied"
        );
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 1);
    }
}

#[test]
fn info_file_rewritten_by_others_is_not_removed() {
    let dir = TestDir::new();
    let file = dir.join("info.json");
    let proxy = start_with_info_file(&file);
    let rewritten = format!("{} ", fs::read_to_string(&file).unwrap());
    fs::write(&file, &rewritten).unwrap();
    assert_eq!(proxy.stop().status.code(), Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), rewritten);
}

#[test]
fn links_in_read_only_directory_are_not_followed() {
    let dir = TestDir::new();
    let victim = dir.join("victim");
    let outside = TestDir::new();
    let linked = outside.join("linked");
    for file in [&victim, &linked] {
        write_shared(file, "untouched");
    }
    symlink(&victim, dir.join("symbolic")).unwrap();
    if fs::hard_link(&linked, dir.join("hard")).is_err() {
        skip("a hard link", "on another file system");
    }
    let _read_only = ReadOnly::new(&dir);
    for name in ["symbolic", "hard", "missing"] {
        let path = dir.join(name);
        let Some(command) = unprivileged("links", ProxyCommand::without_key) else {
            return;
        };
        let command = command.arg("--server-info").arg(&path);
        command.assert_startup_error(name, 1, &[path.to_str().unwrap()]);
    }
    for file in [&victim, &linked] {
        assert_eq!(fs::read_to_string(file).unwrap(), "untouched");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn info_file_mounted_into_a_container_is_written_in_place() {
    let dir = TestDir::new();
    let (source, file) = (dir.join("source"), dir.join("info.json"));
    write_shared(&source, "");
    write_shared(&file, "");
    let command = ProxyCommand::new().arg("--server-info").arg(&file);
    let mounts = vec![Mount::File(source.clone(), file)];
    if let Some(proxy) = start_with_mounts("a mounted info file", command, mounts) {
        assert_info(&source, &proxy);
        assert_eq!(proxy.stop().status.code(), Some(0));
        assert_eq!(fs::read_to_string(&source).unwrap(), "");
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 2);
    }
}
