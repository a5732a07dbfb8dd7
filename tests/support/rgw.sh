#!/usr/bin/env bash
# A throw-away S3 server on loopback: Ceph with one monitor, one OSD in memory, one gateway. Keys AKTEST / SKTEST.
# usage: rgw.sh DIRECTORY S3_PORT MON_PORT start|stop   (Debian: radosgw ceph-mon ceph-osd)
set -euo pipefail
dir=$1 port=$2 mon=$3 verb=$4
if [ "$verb" = stop ]; then
  for pid in "$dir"/run/*.pid; do kill -9 "$(cat "$pid")" 2>/dev/null || true; done
  rm -rf "$dir"
  exit 0
fi
rm -rf "$dir"
mkdir -p "$dir"/mon "$dir"/osd "$dir"/rgw "$dir"/log "$dir"/run
fsid=7b3c9b52-0000-4000-8000-000000000001
conf=$dir/ceph.conf keys=$dir/keyring
cat > "$conf" <<C
[global]
fsid = $fsid
mon host = v2:127.0.0.1:$mon
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
keyring = $keys
run dir = $dir/run
admin socket = $dir/run/\$name.asok
pid file = $dir/run/\$name.pid
log file = $dir/log/\$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = $dir/mon
mon data avail crit = 1
osd data = $dir/osd
osd objectstore = memstore
memstore device bytes = 4294967296
rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port
rgw thread pool size = 32
C
ceph-authtool --create-keyring "$keys" --gen-key -n mon. --cap mon 'allow *' > /dev/null
ceph-authtool "$keys" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ceph-authtool "$keys" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
ceph-authtool "$keys" --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
monmaptool --create --fsid $fsid --addv a "[v2:127.0.0.1:$mon]" "$dir/monmap" > /dev/null
ceph-mon -i a --mkfs --monmap "$dir/monmap" --keyring "$keys" -c "$conf"
ceph-mon -i a -c "$conf"
ceph -c "$conf" --connect-timeout 20 osd new 7b3c9b52-0000-4000-8000-000000000002 > /dev/null
ceph-osd -i 0 --mkfs --osd-uuid 7b3c9b52-0000-4000-8000-000000000002 -c "$conf" > /dev/null 2>&1
ceph-osd -i 0 -c "$conf" > /dev/null 2>&1
radosgw -n client.rgw -c "$conf"
for _ in $(seq 600); do
  (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null && break
  sleep 0.1
done
radosgw-admin -c "$conf" user create --uid=t --display-name=t --access-key=AKTEST --secret-key=SKTEST > /dev/null
