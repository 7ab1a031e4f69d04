//! How each proxy is told to do the same job: add the key, check the upstream's certificate, keep
//! its connections, hold nothing back, log a line per request.

use crate::upstream::Upstream;
use crate::wire::{HOST, KEY};

/// The arguments that this proxy and OpenAI's have in common.
pub(crate) fn arguments(port: u16, upstream: &Upstream) -> [String; 4] {
    [
        "--port".to_owned(),
        port.to_string(),
        "--upstream-url".to_owned(),
        format!("https://{HOST}:{}/v1/responses", upstream.port),
    ]
}

/// nginx's configuration. Its limits of 1,000 requests a connection are lifted: they would make it,
/// and nobody else, connect anew while being measured.
pub(crate) fn nginx(port: u16, upstream: &Upstream) -> String {
    let (up, ca) = (upstream.port, upstream.ca.display());
    format!(
        r#"daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log error.log error;
events {{ worker_connections 4096; }}
http {{
    access_log access.log;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server_tokens off;
    tcp_nodelay on;
    keepalive_timeout 120s;
    keepalive_requests 100000000;
    client_max_body_size 0;
    upstream api {{
        server 127.0.0.1:{up};
        keepalive 100;
        keepalive_requests 100000000;
        keepalive_time 1h;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 403; }}
        location = /v1/responses {{
            limit_except POST {{ deny all; }}
            proxy_pass https://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host {HOST}:{up};
            proxy_set_header Authorization "Bearer {KEY}";
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_name {HOST};
            proxy_ssl_server_name on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"#
    )
}

/// HAProxy's configuration.
pub(crate) fn haproxy(port: u16, upstream: &Upstream) -> String {
    let (up, ca) = (upstream.port, upstream.ca.display());
    format!(
        r#"global
    nbthread 1
    maxconn 4096
    log stderr format raw local0
defaults
    mode http
    log global
    option httplog
    option http-no-delay
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    timeout http-request 120s
    http-reuse always
frontend local
    bind 127.0.0.1:{port}
    http-request deny unless METH_POST {{ path /v1/responses }}
    http-request set-header Host {HOST}:{up}
    http-request set-header Authorization "Bearer {KEY}"
    default_backend api
backend api
    server api 127.0.0.1:{up} ssl verify required ca-file {ca} sni str({HOST}) verifyhost {HOST} pool-max-conn 100
"#
    )
}
