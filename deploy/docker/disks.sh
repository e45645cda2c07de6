#!/bin/sh
# Disks of a testbed's devices: files in /disks, each behind a loop device of the host. Needs SYS_ADMIN and the host's /dev.
#
#   disks.sh STORE make NAME=MIB ...     prints NAME DEVICE for each
#   disks.sh STORE release               gives all of them back, and prints the devices; STORE is the volume's name on the host
set -eu
store=$1 verb=$2
shift 2
case $verb in
  make)
    for each in "$@"; do
      file=/disks/$store.${each%%=*}.img
      truncate -s "${each#*=}M" "$file" # takes room as it is written
      # No room is kept back for root, and the account of the containers owns it.
      mkfs.ext4 -q -m 0 -E root_owner=10001:10001,lazy_itable_init=1,lazy_journal_init=1 "$file"
      echo "${each%%=*} $(losetup --find --show "$file")"
    done
    ;;
  release)
    # The path that the kernel tells is of a container that is gone, so the file's name has to be nobody else's on this machine.
    losetup --list --noheadings --raw --output NAME,BACK-FILE | while read -r device file; do
      case $file in
        */"$store".*) losetup --detach "$device" && echo "$device" ;;
      esac
    done
    ;;
esac
