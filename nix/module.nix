# `packageFor` builds the program with the machine's own `pkgs`.
{ packageFor }:
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  inherit (lib)
    mkDefault
    mkEnableOption
    mkOption
    types
    ;
  name = "codex-responses-proxy";
  cfg = config.services.${name};
  toml = pkgs.formats.toml { };

  # In a unit, % starts a specifier.
  escapeSpecifiers = lib.replaceStrings [ "%" ] [ "%%" ];

  # The kernel is queried for the owners of connections.
  checksOwners = cfg.allowedUsers != null || cfg.upstreamUser != null;

  # With userborn or sysusers, one of these units installs the secrets. Neither is ordered before other services.
  secretUnits = [
    "agenix-install-secrets.service"
    "sops-install-secrets.service"
  ];
in
{
  # The same key for both of its names in the flake: importing both is importing it once.
  key = "codex-responses-proxy#nixosModules.default";
  _class = "nixos";

  options.services.codex-responses-proxy = {
    enable = mkEnableOption "codex-responses-proxy, which lets unprivileged users run Codex without holding the OpenAI API key";

    package = mkOption {
      type = types.package;
      default = packageFor pkgs;
      defaultText = lib.literalMD "the flake's package, built with the machine's `pkgs`";
      description = "The codex-responses-proxy package to use.";
    };

    keyFile = mkOption {
      # A path literal would be copied to the store, where every user can read it.
      type = types.externalPath // {
        description = "absolute path outside the Nix store, as a string";
      };
      example = lib.literalExpression "config.age.secrets.openai-api-key.path";
      description = ''
        File with the OpenAI API key and nothing else, on its first line.
        systemd opens it as root and passes it to the service as its standard
        input. The service's own user cannot open it, so it should be readable
        by root alone.

        This is the path of the decrypted secret on the running machine, such as
        {option}`config.age.secrets.<name>.path` with agenix or
        {option}`config.sops.secrets.<name>.path` with sops-nix.
      '';
    };

    port = mkOption {
      type = types.port;
      default = 8399;
      description = ''
        Port on 127.0.0.1 to listen on. systemd holds it while
        {file}`codex-responses-proxy.socket` is active, so no other user can take
        it while the service restarts.
      '';
    };

    upstreamUrl = mkOption {
      type = types.str;
      default = "https://api.openai.com/v1/responses";
      example = "https://NAME.openai.azure.com/openai/v1/responses";
      description = ''
        Absolute URL to forward requests to, including its query. `http://` is
        accepted for loopback hosts only.
      '';
    };

    upstreamCaFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/etc/ssl/certs/company.pem";
      description = ''
        PEM bundle of certificates to trust for the upstream, in addition to the
        built-in root certificates. It must be readable by every user.
      '';
    };

    upstreamUser = mkOption {
      type = types.nullOr types.nonEmptyStr;
      default = null;
      example = "litellm";
      description = ''
        Owner of an upstream at an `http://` URL: a name, a numeric id, or a group
        with a leading `@`. The kernel is asked who owns the upstream's end of each
        connection, and nobody else but root gets the key. Needed for such an
        upstream if {option}`allowedUsers` is set and the upstream is not root's.
        With neither, the service can't ask, and any local user who takes the
        upstream's port gets the key.
      '';
    };

    allowedUsers = mkOption {
      type = types.nullOr (types.nonEmptyListOf types.nonEmptyStr);
      default = null;
      example = [
        "alice"
        "@developers"
      ];
      description = ''
        Local users to serve: names, UIDs, or groups with a leading `@`. The
        kernel reports the owner of each connection; other users get a 403. With
        `null`, every local user is served. An empty list is rejected, so a
        computed list that turns out empty doesn't admit everyone.
      '';
    };

    httpShutdown = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether `GET /shutdown` stops the service. The next connection starts it
        again.
      '';
    };

    websocket = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to forward WebSocket handshakes on `GET /v1/responses` as well.
        Codex then keeps one connection per session and sends only the new items
        of each turn. With {option}`codexConfig.enable`, Codex is configured to
        use it.
      '';
    };

    environment = mkOption {
      type = types.attrsOf types.str;
      default = { };
      example = {
        HTTPS_PROXY = "http://proxy.example.com:3128";
      };
      description = ''
        Environment variables of the service, such as {env}`HTTPS_PROXY`,
        {env}`ALL_PROXY` and {env}`NO_PROXY`;
        {option}`config.networking.proxy.envVars` has the machine's own. They are
        stored in the Nix store, where every user can read them.
      '';
    };

    codexConfig = {
      enable = mkEnableOption "{file}`/etc/codex/config.toml`, which makes Codex use this proxy for every user. A user's own {file}`~/.codex/config.toml` takes precedence";

      settings = mkOption {
        inherit (toml) type;
        default = { };
        example = {
          model = "gpt-5.1-codex";
          approval_policy = "on-request";
        };
        description = ''
          Settings in {file}`/etc/codex/config.toml`, in addition to the model
          provider of this proxy.
        '';
      };
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = builtins.match "[^\n\\\\]*[^\n\\\\[:space:]]" cfg.keyFile != null;
        message = "services.${name}.keyFile must not contain a newline or a backslash, or end in a space.";
      }
    ];

    # The kernel reports the owners of connections through these. Hosts that lock modules need them early.
    boot.kernelModules = lib.mkIf checksOwners [
      "inet_diag"
      "tcp_diag"
    ];

    services.${name}.codexConfig.settings = {
      model_provider = mkDefault name;
      model_providers.${name} = {
        name = mkDefault "OpenAI through codex-responses-proxy";
        base_url = mkDefault "http://127.0.0.1:${toString cfg.port}/v1";
        wire_api = mkDefault "responses";
        supports_websockets = lib.mkIf cfg.websocket (mkDefault true);
      };
    };
    environment.etc."codex/config.toml" = lib.mkIf cfg.codexConfig.enable {
      source = toml.generate "codex-config.toml" cfg.codexConfig.settings;
    };

    systemd = {
      sockets.${name} = {
        description = "Loopback port of the Codex responses proxy";
        wantedBy = [ "sockets.target" ];
        # see that service
        requires = [ "${name}-port.service" ];
        after = [ "${name}-port.service" ];
        listenStreams = [ "127.0.0.1:${toString cfg.port}" ];
        # Keep the port, no matter how often the service fails to start.
        socketConfig.TriggerLimitIntervalSec = 0;
      };

      # A switch to another configuration doesn't restart a changed socket. Stopping it with
      # every change of the service (NixOS's default) would let another user take the port
      # meanwhile. So the socket requires this unit, which changes with the port only.
      services."${name}-port" = {
        description = "Port number of the Codex responses proxy";
        restartTriggers = [ cfg.port ];
        stopIfChanged = false;
        enableDefaultPath = false;
        # These change with every update of nixpkgs.
        environment = {
          LOCALE_ARCHIVE = lib.mkForce null;
          TZDIR = lib.mkForce null;
        };
        unitConfig.DefaultDependencies = false;
        conflicts = [ "shutdown.target" ];
        before = [ "shutdown.target" ];
        serviceConfig = {
          Type = "oneshot";
          RemainAfterExit = true;
          ExecStart = "/bin/sh -c :";
        };
      };

      services.${name} = {
        description = "Codex responses proxy";
        # At boot, not at the first request, so that a missing key is noticed.
        wantedBy = [ "multi-user.target" ];
        bindsTo = [ "${name}.socket" ];
        wants = secretUnits;
        after = [
          "${name}.socket"
          "network.target"
        ]
        ++ secretUnits;
        enableDefaultPath = false;
        stopIfChanged = false;
        environment = lib.mapAttrs (_: escapeSpecifiers) cfg.environment;
        startLimitIntervalSec = 0;

        serviceConfig = {
          Type = "notify";
          ExecStart = utils.escapeSystemdExecArgs (
            [
              (lib.getExe cfg.package)
              "--upstream-url"
              cfg.upstreamUrl
            ]
            ++ lib.optionals (cfg.upstreamCaFile != null) [
              "--upstream-ca"
              "${cfg.upstreamCaFile}"
            ]
            ++ lib.optionals (cfg.upstreamUser != null) [
              "--upstream-user"
              cfg.upstreamUser
            ]
            ++ lib.optional cfg.httpShutdown "--http-shutdown"
            ++ lib.optional cfg.websocket "--websocket"
            ++ lib.concatMap (user: [
              "--allow-user"
              user
            ]) (lib.defaultTo [ ] cfg.allowedUsers)
          );
          # Opened by systemd as root. Credentials are set up after stdin is opened.
          StandardInput = "file:${escapeSpecifiers cfg.keyFile}";
          # A key that stays missing must not fill the journal.
          Restart = "on-failure";
          RestartSec = "5s";
          RestartSteps = 10;
          RestartMaxDelaySec = "1min";
          # Open streams have 30 s to finish.
          TimeoutStopSec = "40s";

          # No root directory of its own: name resolution needs the directory of nscd's socket, which
          # is replaced when nscd restarts.
          DynamicUser = true;
          UMask = "0077";

          # The key's page is locked. Keep the rest of the process off the disk, too.
          LimitCORE = 0;
          MemorySwapMax = 0;
          # 4,096 clients that are stuck in both directions take 1.1 GB, and socket buffers count, too.
          MemoryMax = "2G";

          AmbientCapabilities = "";
          CapabilityBoundingSet = "";
          DevicePolicy = "closed";
          KeyringMode = "private";
          LockPersonality = true;
          MemoryDenyWriteExecute = true;
          NoNewPrivileges = true;
          PrivateDevices = true;
          PrivateIPC = true;
          PrivateMounts = true;
          PrivateTmp = true;
          # Hides the UIDs of other users, which the kernel reports.
          PrivateUsers = !checksOwners;
          ProcSubset = "pid";
          ProtectClock = true;
          ProtectControlGroups = true;
          ProtectHome = true;
          ProtectHostname = true;
          ProtectKernelLogs = true;
          ProtectKernelModules = true;
          ProtectKernelTunables = true;
          ProtectProc = "invisible";
          ProtectSystem = "strict";
          RemoveIPC = true;
          RestrictAddressFamilies = [
            "AF_INET"
            "AF_INET6"
            # name resolution and sd_notify
            "AF_UNIX"
          ]
          ++ lib.optional checksOwners "AF_NETLINK";
          RestrictNamespaces = true;
          RestrictRealtime = true;
          RestrictSUIDSGID = true;
          # The port comes from systemd.
          SocketBindDeny = "any";
          SystemCallArchitectures = "native";
          SystemCallErrorNumber = "EPERM";
          SystemCallFilter = [
            "@system-service"
            "~@privileged @resources"
          ];
        };
      };
    };
  };
}
